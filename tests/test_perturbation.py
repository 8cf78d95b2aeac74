"""Perturbation methods by hand, by slow reference, by closed form, and how many images they show the model at once."""

from functools import partial

import pytest
import torch
from tests.reference import perturbation as reference
from tests.same import close
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sightline.explainers.perturbation import ablation_cam, occlusion, rise, score_cam
from sightline.explainers.scorer import Scorer
from sightline.testing import LinearModel, PooledModel

TARGETS = torch.tensor([[0, 3], [1, 1], [2, 0]])


class Net(nn.Module):
    """Two convolutions; behind the last one a head that is not linear."""

    layer = "conv2"

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(5, 4)

    def trunk(self, x):
        return self.conv1(x).relu()

    def head(self, before, features):
        return self.fc(features.relu().square().mean((2, 3)).tanh())

    def forward(self, x):
        before = self.trunk(x)
        return self.head(before, self.conv2(before))


class Skip(Net):
    """The layer's output is added to its input."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def head(self, before, features):
        return self.fc((before + features).relu().square().mean((2, 3)))


class Concatenated(Net):
    """The layer's output is joined to its input: one image's trunk does not broadcast."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.fc = nn.Linear(11, 4)

    def head(self, before, features):
        return self.fc(torch.cat([before, features], 1).relu().square().mean((2, 3)))


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Rows(Net):
    """The layer yields (b, h, w, k)."""

    layer = "last"

    def __init__(self):
        super().__init__()
        self.last = ChannelsLast()

    def forward(self, x):
        before = self.trunk(x)
        return self.head(before, self.last(self.conv2(before)).permute(0, 3, 1, 2))


class WithClassToken(nn.Module):
    """Tokens of a map behind one of their own, and something else that no map is."""

    def forward(self, x):
        tokens = x.flatten(2).mT
        return torch.tensor(0.0), torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


class Tokens(Net):
    layer = "tokens"

    def __init__(self):
        super().__init__()
        self.tokens = WithClassToken()

    def forward(self, x):
        _, tokens = self.tokens(self.conv2(self.trunk(x)))
        return self.fc((tokens[:, 0] + tokens[:, 1:].square().mean(1)).tanh())


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1, stride=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().square().mean((2, 3, 4)))


def seeded(build, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().to(dtype).eval()


def begun(model, images, targets=None, **options):
    score = Scorer(model, targets, **options)
    with torch.no_grad():
        score.begin(images)
    return score


def output_of(model, layer, images):
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[0]


@pytest.fixture
def images():
    return torch.randn(3, 3, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ablate(images, activations, head, layer, score):
    return ablation_cam.formula(images, activations, head, layer, 0, score)


METHODS = {
    "occlusion": partial(occlusion.formula, patch=4, stride=3),
    "rise": partial(rise.formula, masks=20, cells=3),
    "score_cam": score_cam.formula,
    "ablation_cam": partial(ablate, head=None, layer="conv2"),
}


def called(name, score, images):
    """The method on a net with a layer conv2."""
    activations = {"activations": score.model.conv2(score.model.trunk(images))} if "cam" in name else {}
    return METHODS[name](images=images, score=score, **activations)


def maps_of(name, score, images):
    with torch.no_grad():
        return called(name, score, images)


# Against the papers


@pytest.mark.parametrize(("patch", "stride"), [(1, 1), (4, 3), (3, 1), (7, 7)])
def test_occlusion_equals_the_loop(patch, stride, images):
    model = seeded(Net)
    found = occlusion.formula(images, begun(model, images, TARGETS), patch=patch, stride=stride, fill=0.5)
    for i in range(3):
        for t in range(2):
            slow = reference.occlusion(lambda x, c=TARGETS[i, t]: model(x[None])[0, c], images[i], patch, stride, 0.5)
            assert close(slow.detach(), found[i, t])


def test_rise_equals_the_loop_of_the_paper(images):
    model = seeded(Net)
    found = rise.formula(images, begun(model, images, TARGETS), masks=15, cells=4, keep=0.3, seed=7)
    masks = reference.rise_masks(9, 7, 15, 4, 0.3, 7, torch.float64)
    for i in range(3):
        for t in range(2):
            slow = reference.rise(lambda x, c=TARGETS[i, t]: model(x[None]).softmax(1)[0, c], images[i], masks, 0.3)
            assert close(slow.detach(), found[i, t])


def test_score_cam_equals_the_loop_of_the_paper(images):
    model = seeded(Net)
    activations = output_of(model, "conv2", images)
    found = score_cam.formula(images, activations, begun(model, images, TARGETS))
    assert found.amax((2, 3)).gt(0).any()
    for i in range(3):
        for t in range(2):
            slow = reference.score_cam(
                lambda x, c=TARGETS[i, t]: model(x[None])[0, c].detach(), images[i], activations[i]
            )
            assert close(slow, found[i, t])


@pytest.mark.parametrize("build", [Net, Skip, Concatenated])
def test_ablation_cam_equals_the_loop_of_the_paper(build, images):
    model = seeded(build)
    activations = output_of(model, "conv2", images)
    score = begun(model, images, TARGETS, batch_size=4)
    found = ablate(images, activations, None, "conv2", score)
    assert found.amax((2, 3)).gt(0).any()
    for i in range(3):
        before = model.trunk(images[i : i + 1])
        for t in range(2):
            slow = reference.ablation_cam(
                lambda a, before=before, c=TARGETS[i, t]: model.head(before, a[None])[0, c], activations[i]
            )
            assert close(slow.detach(), found[i, t])


# By hand and in closed form


def test_occlusion_of_a_linear_model_is_weight_times_image(images):
    weight = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    score = begun(LinearModel(weight), images, TARGETS)
    found = occlusion.formula(images, score, patch=1, stride=1)
    assert close((weight[TARGETS] * images[:, None]).sum(2), found)


def test_the_default_patch_is_an_eighth_of_each_side_and_its_half_the_stride():
    images = torch.zeros(1, 1, 32, 16)
    images[0, 0, 5, 3] = 1  # rows 4..7 and 2..5 of patches of 4, columns 2..3 and 3..4 of patches of 2
    found = occlusion.formula(images, begun(LinearModel(torch.ones(2, 1, 32, 16)), images, 0))[0, 0]
    rows, columns = torch.zeros(32), torch.zeros(16)
    rows[2:8] = torch.tensor([0.5, 0.5, 1, 1, 0.5, 0.5])
    columns[2:5] = torch.tensor([0.5, 1, 0.5])
    assert found.equal(rows[:, None] * columns)


def test_rise_of_masks_that_keep_everything_is_the_probability(images):
    model = seeded(Net)
    found = rise.formula(images, begun(model, images, TARGETS), masks=3, keep=1.0)
    shares = model(images).softmax(1).gather(1, TARGETS).detach()
    assert close(shares[:, :, None, None].expand(-1, -1, 9, 7), found)


def test_rise_of_a_linear_score_has_the_expectation_worked_out():
    # E[S_j] = sum_i w_i x_i E[M_i M_j] / p with E[M_i M_j] = p^2 + p (1 - p) E[sum_k r_ki r_kj], r the interpolation.
    weight = torch.randn(1, 1, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    images, keep, count = torch.ones_like(weight), 0.4, 20000
    score = begun(LinearModel(weight), images, lambda output: output[:, 0], batch_size=2000)
    found = rise.formula(images, score, masks=count, cells=2, keep=keep)[0, 0]
    units = torch.eye(4, dtype=torch.float64).view(4, 2, 2)
    together = torch.zeros(30, 30, dtype=torch.float64)
    for down in range(3):
        for right in range(3):
            ramps = torch.stack([reference.enlarge(unit, 9, 9)[down : down + 6, right : right + 5] for unit in units])
            together += ramps.flatten(1).T @ ramps.flatten(1) / 9
    expected = (weight.flatten() @ (keep**2 + keep * (1 - keep) * together) / keep).view(6, 5)
    assert (expected - expected.mean()).abs().max() > 0.3
    # A single mask's value deviates by at most sum |w| / p; the mean of 20000 by much less than a hundredth of it.
    assert (found - expected).abs().max() < 0.01 * weight.abs().sum()
    # keep^2 without the interpolated part, as if pixels were masked one by one, is far off.
    assert (found - keep * weight.sum()).abs().max() > 0.3


def test_rise_takes_probabilities_score_cam_logits(images):
    class Shifted(Net):
        def forward(self, x):
            return super().forward(x) + 100

    plain, shifted = seeded(Net), seeded(Shifted)
    a, b = (begun(model, images, TARGETS) for model in (plain, shifted))
    assert torch.allclose(maps_of("rise", a, images), maps_of("rise", b, images), atol=1e-12)
    assert torch.allclose(maps_of("score_cam", a, images), maps_of("score_cam", b, images), atol=1e-12)
    assert not torch.allclose(maps_of("ablation_cam", a, images), maps_of("ablation_cam", b, images), atol=1e-2)


def test_score_cam_by_hand():
    images = torch.tensor([[[[1.0, 1.0]], [[2.0, 0.0]]]])
    model = LinearModel(torch.tensor([[[[3.0, 0.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]]))
    activations = torch.tensor([[[[5.0, 7.0]], [[4.0, 2.0]], [[9.0, 9.0]]]])  # masks (0, 1), (1, 0), and a flat one
    found = score_cam.formula(images, activations, begun(model, images, 0))
    shares = torch.tensor([0.0, 3.0]).softmax(0)
    assert close((shares[:, None, None] * activations[0, :2]).sum(0), found[0, 0])


def test_flat_channels_neither_count_nor_cost_a_forward(images):
    model = seeded(Net)
    activations = output_of(model, "conv2", images)
    flat = torch.cat([activations, torch.full_like(activations[:, :2], 1e3), torch.zeros_like(activations[:, :1])], 1)
    seen = []
    plain, more = (begun(model, images, 1) for _ in range(2))
    expected = score_cam.formula(images, activations, plain)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    assert score_cam.formula(images, flat, more).equal(expected)
    assert sum(seen) == 3 * 5
    nothing = score_cam.formula(images, torch.ones_like(activations), more)
    assert nothing.equal(torch.zeros_like(expected))
    noisy = torch.cat([activations, 1e3 + 1e-12 * torch.rand_like(activations[:, :1])], 1)
    assert score_cam.formula(images, noisy, more).equal(expected)


def test_a_channel_that_is_flat_in_the_image_alone_covers_all_of_it():
    images, activations = torch.ones(1, 1, 1, 2), torch.tensor([[[[0.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])
    score = begun(LinearModel(torch.ones(2, 1, 1, 2)), images, 0)
    shares = torch.tensor([0.0, 1.0]).softmax(0)  # in two pixels: (a, a) and (0, 1)
    assert close((shares[:, None, None] * activations[0]).sum(0), score_cam.formula(images, activations, score)[0, 0])


def test_score_cam_of_few_channels_takes_those_of_largest_norm_in_each_image(images):
    model = seeded(Net)
    activations = output_of(model, "conv2", images)
    score = begun(model, images, 1)
    most = activations.flatten(2).norm(dim=2).topk(2).indices
    found = score_cam.formula(images, activations, score, channels=2)
    kept = activations.gather(1, most[:, :, None, None].expand(-1, -1, *activations.shape[2:]))
    assert close(score_cam.formula(images, kept, score), found)
    everything = score_cam.formula(images, activations, score)
    assert score_cam.formula(images, activations, score, channels=5).equal(everything)
    assert score_cam.formula(images, activations, score, channels=99).equal(everything)
    assert not close(everything, found)


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_ablation_cam_behind_pooling_is_the_share_of_each_mean(bias, images):
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    model = PooledModel(weight)
    nn.init.constant_(model.head.bias, bias)
    model.double()
    score = begun(model, images, TARGETS)
    logits = model(images).gather(1, TARGETS).detach()
    shares = weight[TARGETS] * images.mean((2, 3))[:, None] / logits[:, :, None]
    expected = torch.einsum("btk,bkhw->bthw", shares, images).relu()
    assert expected.amax((2, 3)).gt(0).any()
    assert close(expected, ablate(images, images, None, "features", score))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(1))
    closed = ablate(images, images, weight, "no module", score)
    assert close(expected, closed) and not seen


def test_ablation_cam_of_a_binary_head_with_one_logit(images):
    model = PooledModel(torch.tensor([[1.0, -2.0, 0.5]])).double()
    score = begun(model, images, torch.tensor([[0, 1]] * 3))
    found = ablate(images, images, None, "features", score)
    share = model.head.weight[0] * images.mean((2, 3)) / model(images)
    assert close(torch.einsum("bk,bkhw->bhw", share, images).relu().detach(), found[:, 0])
    assert close(found[:, 0], found[:, 1])  # both logits are +-z, and the share of z is the same


def test_ablation_cam_of_a_logit_of_zero_is_zero():
    images = torch.ones(1, 3, 2, 2)
    model = PooledModel(torch.tensor([[1.0, -2.0, 1.0], [1.0, 0.0, 0.0]]))
    score = begun(model, images, 0)
    assert ablate(images, images, None, "features", score).equal(torch.zeros(1, 1, 2, 2))
    assert ablate(images, images, model.head.weight.detach(), "features", score).equal(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("build", [Rows, Tokens])
def test_ablation_cam_finds_the_channels_of_other_layouts(build, images):
    model = seeded(build)
    output = output_of(model, model.layer, images)
    activations = output.permute(0, 3, 1, 2) if build is Rows else output[1][:, 1:].mT.unflatten(2, (5, 4))
    score = begun(model, images)
    found = ablate(images, activations, None, model.layer, score)
    assert found.max() > 0
    for i, target in enumerate(score.targets[:, 0]):
        total = torch.zeros(5, 4, dtype=torch.float64)
        for k in range(5):

            def without(module, inputs, output, k=k):
                if build is Tokens:
                    output[1][..., k] = 0
                    return output
                output = output.clone()
                output[..., k] = 0
                return output

            whole = model(images[i : i + 1])[0, target]
            handle = model.get_submodule(model.layer).register_forward_hook(without)
            part = model(images[i : i + 1])[0, target]
            handle.remove()
            total += ((whole - part) / whole * activations[i, k]).detach()
        assert close(total.clamp(min=0), found[i, 0])


# What does not matter


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_its_images_and_several_targets_one_each(name, images):
    model = seeded(Net)
    together = maps_of(name, begun(model, images, TARGETS), images)
    assert together.isfinite().all() and together.amax((2, 3)).gt(0).any()
    for i in range(3):
        for t in range(2):
            alone = maps_of(name, begun(model, images[i : i + 1], int(TARGETS[i, t])), images[i : i + 1])
            assert close(alone[0, 0], together[i, t])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", [Net, Concatenated])
def test_the_model_never_sees_more_images_than_asked_for_and_the_batch_size_changes_nothing(name, build, images):
    model = seeded(build)
    expected = maps_of(name, begun(model, images, TARGETS), images)
    seen = []
    model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.fc.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for batch_size in (1, 4, 5):
        calls = []
        score = begun(
            model, images, TARGETS, batch_size=batch_size, progress=lambda *call, calls=calls: calls.append(call)
        )
        activations = {"activations": output_of(model, "conv2", images)} if "cam" in name else {}
        seen.clear()
        assert close(expected, METHODS[name](images=images, score=score, **activations))
        assert max(seen) == batch_size
        assert {what for what, _, _ in calls} == {name} and len({total for _, _, total in calls}) == 1
        done = [steps for _, steps, _ in calls]
        assert done == sorted(set(done)) and done[-1] == calls[0][2]
        assert all(b - a <= batch_size for a, b in zip([0, *done], done, strict=False))


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_is_larger_than_a_batch_of_images(name):
    images = torch.randn(3, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    score = begun(PooledModel(torch.randn(4, 3)), images, TARGETS, batch_size=5)
    activations = {"activations": images} if "cam" in name else {}
    options = {"layer": "features"} if name == "ablation_cam" else {}
    with Largest() as largest:
        METHODS[name](images=images, score=score, **activations, **options)
    assert largest.elements <= 5 * 3 * 24 * 20


def test_occlusion_does_not_look_at_the_image_itself_again(images):
    model = seeded(Net)
    score = begun(model, images, 0, batch_size=5)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    occlusion.formula(images, score, patch=3, stride=3)
    assert not any(torch.equal(one, image) for one in torch.cat(seen) for image in images)


def test_a_model_that_fails_for_a_reason_of_its_own_is_not_tried_again(images):
    """Ablation-CAM falls back to whole copies where the model does not fit one image and many channels, no more."""
    model = seeded(Net)
    score = begun(model, images, 0)
    calls = []

    def fail(module, inputs):
        calls.append(1)
        raise KeyError("a defect of the model")

    model.fc.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="a defect"):
        ablate(images, output_of(seeded(Net), "conv2", images), None, "conv2", score)
    assert len(calls) == 1


def test_ablation_cam_runs_the_part_before_the_layer_on_one_image_only(images):
    model = seeded(Skip)
    score = begun(model, images, 0, batch_size=6)
    activations = output_of(model, "conv2", images)
    trunk, head = [], []
    model.conv1.register_forward_pre_hook(lambda module, inputs: trunk.append(len(inputs[0])))
    model.fc.register_forward_pre_hook(lambda module, inputs: head.append(len(inputs[0])))
    ablate(images, activations, None, "conv2", score)
    assert trunk == [1] * 3 and head == [6] * 3  # six channels of each of three images


def test_the_seed_alone_decides_the_masks(images):
    model = seeded(Net)
    score = begun(model, images, 0)
    before = torch.get_rng_state()
    first = rise.formula(images, score, masks=10)
    torch.rand(3)
    assert rise.formula(images, score, masks=10).equal(first)
    assert not close(rise.formula(images, score, masks=10, seed=1), first)
    torch.set_rng_state(before)
    rise.formula(images, score, masks=10)
    assert torch.get_rng_state().equal(before)


def test_all_images_of_a_batch_get_bit_equal_masks():
    images = torch.ones(3, 1, 9, 7)
    seen = []

    def remember(output):
        seen.append(output.clone())
        return output.flatten(1).sum(1)

    rise.formula(images, begun(nn.Identity(), images, remember, batch_size=7), masks=10)
    masks = torch.cat(seen[1:])[:, 0].unflatten(0, (10, 3))
    assert masks.amin() >= 0 and masks.amax() <= 1 and masks.std() > 0.1
    assert masks[:, 0].equal(masks[:, 1]) and masks[:, 0].equal(masks[:, 2])
    seen.clear()
    rise.formula(images[:1], begun(nn.Identity(), images[:1], remember, batch_size=3), masks=10)
    assert torch.cat(seen[1:])[:, 0].equal(masks[:, 0])


@pytest.mark.parametrize(("height", "width", "cells"), [(1, 13, 8), (5, 31, 8), (3, 3, 7), (16, 9, 1)])
def test_masks_cover_images_of_any_size(height, width, cells):
    images = torch.ones(1, 1, height, width, dtype=torch.float64)
    score = begun(LinearModel(torch.ones(2, 1, height, width).double()), images, lambda output: output[:, 0])
    found = rise.formula(images, score, masks=4, cells=cells)
    masks = reference.rise_masks(height, width, 4, cells, 0.5, 0, torch.float64)
    assert close(reference.rise(lambda x: x.sum(), images[0], masks, 0.5), found[0, 0])
    assert close(images, occlusion.formula(images, score, patch=1, stride=1))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_float32(name, dtype, images):
    model = seeded(Net, dtype)
    images = images.to(dtype)
    score = begun(model, images, 0)
    activations = {"activations": output_of(model, "conv2", images).float()} if "cam" in name else {}
    found = METHODS[name](images=images, score=score, **activations)
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_three_dimensional_images():
    model = seeded(Volume)
    images = torch.randn(2, 1, 6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    activations = output_of(model, "conv", images)
    score = begun(model, images, 2, batch_size=3)
    logits = model(images)[:, 2].detach()
    covered = images.clone()
    covered[:, :, 2:4, 2:4, 0:2] = 0
    fall = logits - model(covered)[:, 2].detach()
    assert close(fall, occlusion.formula(images, score, patch=2, stride=2)[:, 0, 2, 2, 0])
    assert rise.formula(images, score, masks=5, cells=2).shape == (2, 1, 6, 5, 4)
    kept = rise.formula(images, score, masks=2, keep=1.0)
    shares = model(images).softmax(1)[:, 2].detach()
    assert close(shares[:, None, None, None, None].expand_as(kept), kept)
    for k in range(4):
        mask = F.interpolate(activations[:, k : k + 1], (6, 5, 4), mode="trilinear")
        assert mask.shape == images.shape
    assert close(
        activations[:, :1].relu(), score_cam.formula(images, activations[:, :1], score)
    )  # one channel: weight 1
    found = ablate(images, activations, None, "conv", score)
    total = torch.zeros_like(activations[:, 0])
    for k in range(4):
        without = activations.clone()
        without[:, k] = 0
        rest = model.fc(without.relu().square().mean((2, 3, 4)))[:, 2].detach()
        total += ((logits - rest) / logits)[:, None, None, None] * activations[:, k]
    assert close(total.relu(), found[:, 0])


# What is left behind


@pytest.mark.parametrize("name", METHODS)
def test_maps_can_stand_in_a_loss(name):
    model = seeded(Net)
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def maps(images):
        score = Scorer(model, 1, batch_size=3, differentiable=True)
        score.begin(images)
        return called(name, score, images)

    assert torch.autograd.gradcheck(maps, images.requires_grad_(), fast_mode=True)
    assert not maps_of(name, begun(model, images, 1), images).requires_grad


def test_the_closed_form_can_stand_in_a_loss():
    model = PooledModel(torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 1.0]])).double()
    nn.init.constant_(model.head.bias, 0.3)
    images = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def maps(images):
        score = Scorer(model, 1, differentiable=True)
        score.begin(images)
        return ablate(images, images, model.head.weight, "features", score)

    assert torch.autograd.gradcheck(maps, images.requires_grad_())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_left_as_they_were(name, fails, images):
    model = seeded(Net)
    score = begun(model, images, TARGETS, batch_size=4)
    activations = {"activations": output_of(model, "conv2", images)} if "cam" in name else {}
    model.train()
    model.conv2.eval()
    calls = []

    def count(module, inputs):
        calls.append(1)
        if fails and len(calls) > 2:
            raise KeyError("the model's own")

    model.fc.register_forward_pre_hook(count)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(KeyError, match="the model's own"):
            METHODS[name](images=images, score=score, **activations)
    else:
        METHODS[name](images=images, score=score, **activations)
    assert len(calls) > 2
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == [0, 0, 0, 1]
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.get_rng_state().equal(random)


def test_a_model_that_cannot_take_the_images_says_so_itself(images):
    class Broken(Net):
        def head(self, before, features):
            raise RuntimeError("no memory of it")

    model = seeded(Net)
    activations = output_of(model, "conv2", images)
    score = begun(model, images, 0)
    model.__class__ = Broken
    with pytest.raises(RuntimeError, match="no memory of it"):
        ablate(images, activations, None, "conv2", score)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(occlusion.formula, patch=8), "expected patch in 1..7, the shortest side of the images, got 8"),
        (partial(occlusion.formula, patch=0), "expected patch in 1..7, the shortest side of the images, got 0"),
        (partial(occlusion.formula, patch=3, stride=4), "expected stride in 1..3, the side of a patch, got 4"),
        (partial(occlusion.formula, stride=0), "expected stride in 1..1, the side of a patch, got 0"),
        (partial(rise.formula, masks=0), "expected masks and cells of at least 1 and keep in"),
        (partial(rise.formula, cells=0), "expected masks and cells of at least 1 and keep in"),
        (partial(rise.formula, keep=0.0), "expected masks and cells of at least 1 and keep in"),
        (partial(rise.formula, keep=1.1), "expected masks and cells of at least 1 and keep in"),
        (partial(METHODS["score_cam"], channels=0), "expected channels of at least 1, got 0"),
        (partial(METHODS["ablation_cam"], layer="input of mean"), "expected a layer that is a module of the model"),
        (partial(METHODS["ablation_cam"], layer="fc"), "expected a layer that yields 5 channels on a grid of 5 x 4"),
    ],
)
def test_errors_say_what_to_do(call, message, images):
    model = seeded(Net)
    cam = (
        {"activations": output_of(model, "conv2", images)} if call.func not in (occlusion.formula, rise.formula) else {}
    )
    with pytest.raises(ValueError, match=message):
        call(images=images, score=begun(model, images, 0), **cam)
