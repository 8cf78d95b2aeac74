"""Class activation maps as formulas over activations and gradients: by hand, by slow reference, by identity."""

from functools import partial

import pytest
import torch
from tests.hand import one_conv
from tests.reference import cams as reference
from tests.same import close
from torch import nn

from sightline.explainers import cams, explain
from sightline.explainers.evidence import gather
from sightline.explainers.intrinsic import activation_map

GRIDS = [(3, 4), (2, 3, 2)]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fields_of(activations, gradients, rivals, targets):
    """What the formulas read, by the names they read it by."""
    return {
        "activations": activations,
        "gradients": gradients,
        "mean_gradients": gradients.flatten(3).mean(3),
        "runner_up_gradients": rivals,
        "targets": targets,
    }


def planted(grid, batch=2, targets=2, channels=5):
    """One channel of both signs, the others behind a ReLU, one dead; gradients of both signs, some of them zero."""
    activations = random(batch, channels, *grid)
    activations[:, 1:] = activations[:, 1:].relu()
    activations[:, 1] = 0
    gradients = random(batch, targets, channels, *grid, seed=1)
    gradients[gradients.abs() < 0.2] = 0
    rivals = random(batch, targets, channels, *grid, seed=2)
    return fields_of(activations, gradients, rivals, torch.zeros(batch, targets, dtype=torch.long))


def apply(explainer, fields, **options):
    return explainer.formula(**{name: fields[name] for name in explainer.needs}, **options)


def capture(model, layer, images, targets):
    """What the engine reads at a layer."""
    needs = {"activations", "gradients", "mean_gradients", "runner_up_gradients", "logits", "targets", "layer"}
    ((evidence,),) = gather(model, images, [(layer, frozenset(needs))], targets).blocks()
    return {name: getattr(evidence, name) for name in needs}


METHODS = {
    "grad_cam": partial(apply, cams.grad_cam),
    "grad_cam_plus_plus": partial(apply, cams.grad_cam_plus_plus),
    "grad_cam_plus_plus(normalize_alpha)": partial(apply, cams.grad_cam_plus_plus, normalize_alpha=True),
    "xgrad_cam": partial(apply, cams.xgrad_cam),
    "layer_cam": partial(apply, cams.layer_cam),
    "hires_cam": partial(apply, cams.hires_cam),
    "eigen_cam": partial(apply, cams.eigen_cam),
    "finer_cam": partial(apply, cams.finer_cam),
    "finer_cam(gamma=0.6)": partial(apply, cams.finer_cam, gamma=0.6),
}
SLOW = {  # of activations (k, *grid), gradients and rival's gradients of one image and target
    "grad_cam": lambda a, g, r: reference.grad_cam(a, g),
    "grad_cam_plus_plus": lambda a, g, r: reference.grad_cam_plus_plus(a, g),
    "grad_cam_plus_plus(normalize_alpha)": lambda a, g, r: reference.grad_cam_plus_plus(a, g, normalize_alpha=True),
    "xgrad_cam": lambda a, g, r: reference.xgrad_cam(a, g),
    "layer_cam": lambda a, g, r: reference.layer_cam(a, g),
    "hires_cam": lambda a, g, r: reference.hires_cam(a, g),
    "eigen_cam": lambda a, g, r: reference.eigen_cam(a),
    "finer_cam": lambda a, g, r: reference.finer_cam(a, g, r, gamma=1),
    "finer_cam(gamma=0.6)": lambda a, g, r: reference.finer_cam(a, g, r, gamma=0.6),
}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_formula_equals_the_loop_of_its_paper(name, grid):
    fields = planted(grid)
    found = METHODS[name](fields)
    assert found.shape == (2, 2, *grid) and found.dtype == torch.float64 and found.max() > 0
    for i in range(2):
        for t in range(2):
            of = fields["activations"][i], fields["gradients"][i, t], fields["runner_up_gradients"][i, t]
            assert close(SLOW[name](*of), found[i, t])


@pytest.mark.parametrize("name", METHODS)
def test_float32_equals_float64(name):
    fields = planted((3, 4))
    single = {key: value.float() if value.is_floating_point() else value for key, value in fields.items()}
    found = METHODS[name](single)
    assert found.dtype == torch.float32 and close(METHODS[name](fields).float(), found)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_its_images_and_many_targets_equal_each(name):
    fields = planted((3, 4), batch=3, targets=4)
    found = METHODS[name](fields)
    for i in range(3):
        for t in range(4):
            alone = {
                key: value[i : i + 1] if key == "activations" else value[i : i + 1, t : t + 1]
                for key, value in fields.items()
            }
            assert close(found[i, t], METHODS[name](alone)[0, 0])


@pytest.mark.parametrize("name", METHODS)
def test_one_number_expanded_over_the_grid_equals_the_numbers_written_out(name):
    fields = planted((3, 4))
    for key in ("gradients", "runner_up_gradients"):
        fields[key] = fields[key][..., :1, :1].expand_as(fields[key])
    fields["mean_gradients"] = fields["gradients"].flatten(3).mean(3)
    written_out = {key: value.contiguous() for key, value in fields.items()}
    assert written_out["gradients"].stride(-1) == 1 and fields["gradients"].stride(-1) == 0
    assert close(METHODS[name](written_out), METHODS[name](fields))


@pytest.mark.parametrize("name", METHODS)
def test_expanded_gradients_are_never_written_out(name):
    """Per target and channel at most a few numbers: (1, t, k, 64, 64) written out would be 134 million."""
    grid, channels, targets = (64, 64), 64, 512
    fields = {
        "activations": torch.rand(1, channels, *grid, generator=torch.Generator().manual_seed(0)),
        "targets": torch.zeros(1, targets, dtype=torch.long),
        "mean_gradients": torch.ones(1, targets, channels),
    }
    for key in ("gradients", "runner_up_gradients"):
        fields[key] = torch.ones(1, targets, channels, 1, 1).expand(-1, -1, -1, *grid)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        METHODS[name](fields)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * 4 * targets * grid[0] * grid[1]


def test_hand_values():
    activations = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])
    gradients = torch.tensor([[[[[2.0, 4.0]], [[-1.0, 3.0]]]]])
    rivals = torch.tensor([[[[[1.0, 1.0]], [[2.0, 6.0]]]]])
    fields = fields_of(activations, gradients, rivals, torch.tensor([[0]]))
    assert apply(cams.grad_cam, fields).tolist() == [[[[5.0, 9.0]]]]  # 3 * [1, 3] + 1 * [2, 0]
    # 2 / (2 + 4 * 2) + 4 / (2 + 4 * 4) = 19/45, 3 / (2 + 2 * 3) = 3/8
    assert close(torch.tensor([[[[19 / 45 + 3 / 4, 19 / 15]]]]), apply(cams.grad_cam_plus_plus, fields))
    # (19/45) / (1/10 + 1/18) = 19/7, (3/8) / (1/8) = 3
    normalized = apply(cams.grad_cam_plus_plus, fields, normalize_alpha=True)
    assert close(torch.tensor([[[[19 / 7 + 6, 57 / 7]]]]), normalized)
    # (2 + 12) / 4 * [1, 3] + (-2) / 2 * [2, 0]
    assert apply(cams.xgrad_cam, fields).tolist() == [[[[1.5, 10.5]]]]
    assert apply(cams.layer_cam, fields).tolist() == [[[[2.0, 12.0]]]]
    assert apply(cams.hires_cam, fields).tolist() == [[[[0.0, 12.0]]]]
    # weights 3 - 1 and 1 - 4, then 3 - 1/2 and 1 - 2
    assert apply(cams.finer_cam, fields).tolist() == [[[[0.0, 6.0]]]]
    assert apply(cams.finer_cam, fields, gamma=0.5).tolist() == [[[[0.5, 7.5]]]]


def test_the_weights_and_map_of_xplique():
    """activations = gradients, channels with 4, 2, 1.5 and 0.5 in sum: weights 1, 1/2, 3/8, 1/8."""
    values = torch.tensor(
        [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.5], [0.0, 0.0]], [[0.5, 0.0], [0.0, 0.0]]]
    )
    fields = fields_of(values[None], values[None, None], values[None, None], torch.tensor([[0]]))
    assert fields["mean_gradients"].tolist() == [[[1.0, 0.5, 0.375, 0.125]]]
    assert apply(cams.grad_cam, fields).tolist() == [[[[1.9375, 1.6875], [1.0, 1.0]]]]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_values_of_captum(frozen, inplace):
    model = one_conv(partial(nn.ReLU, inplace)).requires_grad_(not frozen)
    images, targets = torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[0]])
    expected = {"conv1": [[11.25, 13.5], [20.25, 22.5]], "relu1": [[0.0, 4.0], [28.0, 32.5]]}
    for layer, values in expected.items():
        assert explain(model, images, 0, layer=layer)["grad_cam"].tolist() == [[values]]
    assert torch.equal(explain(model, images, 0, layer="input")["grad_cam"], 0.5625 * images)
    fields = capture(model, "conv1", images, targets)
    for k, values in enumerate([[[-3.75, 3.0], [23.25, 30.0]], [[15.0, 10.5], [-3.0, -7.5]]]):
        channel = fields["activations"][:, k : k + 1], fields["mean_gradients"][:, :, k : k + 1]
        assert cams.grad_cam.formula(*channel).tolist() == [[torch.tensor(values).relu().tolist()]]


def test_the_case_of_pair():
    """A detector of horizontal lines on a square of ones sees its upper and lower edge."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    head = nn.Linear(25, 2, bias=False)
    gradient = torch.zeros(5, 5)
    gradient[0, 0] = gradient[4, 4] = 2
    gradient[1, 1:4] = gradient[4, 1:4] = 3
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.0, 2.0, -1.0])[:, None].expand(3, 3))
        head.weight.copy_(torch.stack([gradient.flatten(), -gradient.flatten()]))
    images = torch.zeros(1, 1, 5, 5)
    images[..., 1:4, 1:4] = 1
    fields = capture(nn.Sequential(conv, nn.Flatten(), head), "0", images, torch.tensor([[0]]))
    assert fields["activations"][0, 0, :, 2].tolist() == [-3.0, 3.0, 0.0, 3.0, -3.0]
    line, nothing = [1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3], [0.0] * 5
    found = apply(cams.grad_cam, fields)
    assert close(torch.tensor([[[nothing, line, nothing, line, nothing]]]), found / found.max())
    assert close(torch.tensor(3 * 22 / 25), found.max())


class Pooled(nn.Module):
    """Convolution, ReLU, global average pooling, linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.features = nn.Sequential(self.conv, nn.ReLU())

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Flat(Pooled):
    """No pooling: the head is linear in every position."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6 * 4 * 3, 5)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


class Deep(Flat):
    """A hidden layer behind the features."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(6 * 4 * 3, 9), nn.ReLU(), nn.Linear(9, 5))


IMAGES = random(3, 3, 6, 5, seed=3)
TARGETS = torch.tensor([[0, 3], [1, 4], [2, 0]])


def captured(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
    return model, capture(model, "features", IMAGES, TARGETS)


def test_grad_cam_is_the_positive_part_of_cam_over_the_positions_and_the_mean_of_cam_plus_bias_the_logit():
    model, fields = captured(Pooled)
    found = apply(cams.cam, fields | {"head": model.fc.weight.detach()})
    for i in range(3):
        for t in range(2):
            weights = model.fc.weight.detach()[TARGETS[i, t]]
            assert close(reference.cam(fields["activations"][i], weights), found[i, t])
    assert close(fields["logits"].gather(1, TARGETS), found.mean((2, 3)) + model.fc.bias.detach()[TARGETS])
    for explainer in (cams.grad_cam, cams.xgrad_cam):
        assert close(found.relu() / 12, apply(explainer, fields))
    assert close(found / 12, apply(cams.hires_cam, fields))


def test_the_logit_is_the_sum_of_hires_cam_plus_the_bias_behind_a_linear_head():
    model, fields = captured(Flat)
    found = apply(cams.hires_cam, fields).sum((2, 3)) + model.fc.bias.detach()[TARGETS]
    assert close(fields["logits"].gather(1, TARGETS), found)


def test_xgrad_cam_and_hires_cam_sum_to_activation_times_gradient():
    """Made non-negative by a channel that outweighs the others, the map of XGrad-CAM is what its ReLU is given."""
    _, fields = captured(Deep)
    fields["activations"][:, 0] += 50
    fields["gradients"][:, :, 0] = 1 + fields["gradients"][:, :, 0].abs()
    products = (fields["activations"][:, None] * fields["gradients"]).sum((2, 3, 4))
    assert close(products, apply(cams.hires_cam, fields).sum((2, 3)))
    assert apply(cams.xgrad_cam, fields).min() > 0
    assert close(products, apply(cams.xgrad_cam, fields).sum((2, 3)))


def test_layer_cam_is_hires_cam_where_all_is_positive():
    fields = planted((3, 4))
    assert not close(apply(cams.hires_cam, fields), apply(cams.layer_cam, fields))
    positive = {key: fields[key].abs() for key in ("activations", "gradients")}
    assert close(apply(cams.hires_cam, positive), apply(cams.layer_cam, positive))


def test_grad_cam_plus_plus_has_no_epsilon_and_no_underflow():
    """Where the gradients are so small that sum(A) g vanishes beside 2, the map is linear in them, at any size."""
    fields = planted((3, 4))
    half = reference.weighted(fields["activations"][0], fields["gradients"][0, 0].relu().sum((1, 2)) / 2)
    for scale in (1e-12, 1e-24, 1e-100):
        found = apply(cams.grad_cam_plus_plus, fields | {"gradients": fields["gradients"] * scale})[0, 0]
        assert close(half, found / scale)


def test_grad_cam_plus_plus_in_float32_at_every_scale_of_the_gradient():
    fields = planted((3, 4))
    for scale in (1e-30, 1e-12, 1e-3, 1.0, 1e12):
        small = fields | {"gradients": fields["gradients"] * scale}
        single = {key: value.float() if value.is_floating_point() else value for key, value in small.items()}
        for options in ({}, {"normalize_alpha": True}):
            slow = reference.grad_cam_plus_plus(fields["activations"][0], small["gradients"][0, 0], **options)
            assert slow.max() > 0
            found = apply(cams.grad_cam_plus_plus, single, **options)[0, 0]
            assert close(found / slow.max(), slow / slow.max())


def test_grad_cam_plus_plus_gives_no_weight_where_the_denominator_is_zero():
    activations, gradients = torch.tensor([[[[-2.0, 1.0]]]]), torch.tensor([[[[[2.0, 1.0]]]]])  # 2 - 1 * 2, 2 - 1 * 1
    assert cams.grad_cam_plus_plus.formula(activations, gradients).tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_or_no_activation_gives_no_map(name):
    fields = planted((3, 4))
    dead = fields | {"activations": torch.zeros_like(fields["activations"])}
    assert METHODS[name](dead).eq(0).all()
    if name != "eigen_cam":
        flat = {key: torch.zeros_like(value) for key, value in fields.items() if "gradients" in key}
        assert METHODS[name](fields | flat).eq(0).all()


def test_channels_that_cancel_out_have_no_weight_in_xgrad_cam():
    activations, gradients = torch.tensor([[[[1.0, -1.0]], [[1.0, 2.0]]]]), torch.ones(1, 1, 2, 1, 2)
    assert cams.xgrad_cam.formula(activations, gradients).tolist() == [[[[1.0, 2.0]]]]


def test_finer_cam_is_grad_cam_of_the_difference_of_two_logits():
    model, fields = captured(Deep)
    assert torch.equal(apply(cams.finer_cam, fields, gamma=0.0), apply(cams.grad_cam, fields))
    features = fields["activations"].clone().requires_grad_()
    logits = model.fc(features.flatten(1))
    rivals = logits.detach().scatter(1, TARGETS[:, :1], -torch.inf).argmax(1, keepdim=True)
    difference = logits.gather(1, TARGETS[:, :1]) - 0.6 * logits.gather(1, rivals)
    gradients = torch.autograd.grad(difference.sum(), features)[0]
    found = apply(cams.finer_cam, fields, gamma=0.6)[:, 0]
    assert found.max() > 0
    for i in range(3):
        assert close(reference.grad_cam(fields["activations"][i], gradients[i]), found[i])


@pytest.mark.parametrize("channels", [3, 12, 40])
def test_eigen_cam_by_either_gram_matrix(channels):
    """12 positions: fewer channels, as many, more."""
    activations = random(4, channels, 3, 4)  # of both signs
    found = cams.eigen_cam.formula(activations, torch.zeros(4, 3, dtype=torch.long))
    assert found.shape == (4, 3, 3, 4) and torch.equal(found[:, 0], found[:, 2])
    assert found.sum((2, 3)).min() > 0
    for i in range(4):
        assert close(reference.eigen_cam(activations[i]), found[i, 0])
    # reverse the activations and the map, whose sum is positive again, stays
    assert close(found, cams.eigen_cam.formula(-activations, torch.zeros(4, 3, dtype=torch.long)))


@pytest.mark.parametrize("channels", [3, 40])
def test_eigen_cam_of_a_dead_and_of_a_broken_image_leaves_the_others_alone(channels):
    activations, targets = random(3, channels, 3, 4).relu(), torch.zeros(3, 1, dtype=torch.long)
    expected = cams.eigen_cam.formula(activations[:1], targets[:1])
    activations[1] = 0
    activations[2, 0, 0, 0] = torch.nan
    found = cams.eigen_cam.formula(activations, targets)
    assert close(expected, found[:1]) and found[1].eq(0).all() and found[2].isnan().any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_activation_map_on_any_grid(grid):
    activations = random(2, 3, *grid)
    for norm in ("l2", "mean"):
        found = activation_map.formula(activations, torch.zeros(2, 2, dtype=torch.long), norm=norm)
        assert found.shape == (2, 2, *grid)
        for i in range(2):
            for at in reference.positions(activations[i]):
                values = activations[(i, slice(None), *at)]
                expected = sum(v**2 for v in values) ** 0.5 if norm == "l2" else sum(values) / 3
                assert close(expected, found[(i, 0, *at)]) and found[(i, 0, *at)] == found[(i, 1, *at)]


def test_cam_on_a_volume():
    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv3d(1, 4, 2)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.features(x).mean((2, 3, 4)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Volume().double()
    targets = torch.tensor([[0, 2], [1, 2]])
    fields = capture(model, "features", random(2, 1, 3, 4, 3), targets)
    found = apply(cams.cam, fields | {"head": model.fc.weight.detach()})
    assert found.shape == (2, 2, 2, 3, 2)
    assert close(fields["logits"].gather(1, fields["targets"]), found.mean((2, 3, 4)) + model.fc.bias.detach()[targets])
    assert close(found.relu() / 12, apply(cams.grad_cam, fields))


@pytest.mark.parametrize("name", METHODS)
def test_a_map_can_be_differentiated(name):
    """Also through a dead channel, whose quotients are 0 / 0; gradcheck compares with differences."""
    fields = planted((2, 2), batch=1, targets=1, channels=3)

    def of(activations, gradients):
        varied = fields | {"activations": activations, "gradients": gradients}
        return METHODS[name](varied | {"mean_gradients": gradients.flatten(3).mean(3)})

    inputs = [fields[key].clone().requires_grad_() for key in ("activations", "gradients")]
    found = of(*inputs)
    backward = torch.autograd.grad(found.square().sum(), inputs, allow_unused=True)
    assert backward[0].isfinite().all() and backward[0].abs().max() > 0
    smooth = [random(1, 3, 2, 2, seed=7).abs() + 0.1, random(1, 1, 3, 2, 2, seed=8).abs() + 0.1]
    fields["runner_up_gradients"] = -smooth[1]
    assert torch.autograd.gradcheck(of, [value.requires_grad_() for value in smooth])


def features():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


POOL, MEAN = lambda: nn.AdaptiveAvgPool2d(1), lambda: Of(lambda x: x.mean((2, 3)))
LINEAR_HEADS = {
    "pool conv flatten": lambda: [POOL(), nn.Dropout(), nn.Conv2d(6, 4, 1), nn.Flatten()],
    "pool conv squeeze": lambda: [
        nn.AvgPool2d(8),
        nn.Conv2d(6, 4, 1, bias=False),
        Of(lambda x: x.squeeze(3).squeeze(2)),
    ],
    "mean conv pick": lambda: [
        *(Of(lambda x: x.mean((2, 3), keepdim=True)), nn.Conv2d(6, 4, 1), Of(lambda x: x[:, :, 0, 0]))
    ],
    "conv pool flatten": lambda: [nn.Conv2d(6, 4, 1), POOL(), nn.Flatten()],
    "conv mean": lambda: [nn.Conv2d(6, 4, 1), MEAN()],
    "channels last": lambda: [
        *(Of(lambda x: x.contiguous(memory_format=torch.channels_last)), POOL(), nn.Conv2d(6, 4, 1), nn.Flatten())
    ],
}
OTHER_HEADS = {
    "rectified": lambda: [nn.Conv2d(6, 4, 1), nn.ReLU(), MEAN()],
    "rectified behind": lambda: [POOL(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten()],
    "3 x 3": lambda: [nn.Conv2d(6, 4, 3, padding=1), MEAN()],
    "stride": lambda: [nn.Conv2d(6, 4, 1, stride=2), MEAN()],
    "padding": lambda: [nn.Conv2d(6, 4, 1, padding=1), MEAN()],
    "groups": lambda: [POOL(), nn.Conv2d(6, 4, 1, groups=2), nn.Flatten()],
    "two layers": lambda: [POOL(), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1), nn.Flatten()],
    "coarser pooling": lambda: [nn.AdaptiveAvgPool2d(2), nn.Conv2d(6, 4, 1), Of(lambda x: x[:, :, 0, 0])],
    "transposed": lambda: [POOL(), nn.ConvTranspose2d(6, 6, 1), nn.Flatten()],
}


@pytest.mark.parametrize("name", LINEAR_HEADS)
def test_a_1x1_convolution_is_a_linear_layer_before_and_behind_the_pooling(name):
    model = nn.Sequential(*features(), *LINEAR_HEADS[name]()).double().eval()
    images = random(2, 3, 8, 8)
    layer = next(m for m in model if isinstance(m, nn.Conv2d) and m.out_channels == 4)
    read = model[:2](images).detach()
    found = explain(model, images, 1, ["cam", "grad_cam"], "1")
    expected = torch.einsum("k,bkhw->bhw", layer.weight[1, :, 0, 0].detach(), read)[:, None]
    assert close(expected, found["cam"])
    assert close(expected.relu() / 64, found["grad_cam"])


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_other_heads_have_no_class_activation_map(name):
    model = nn.Sequential(*features(), *OTHER_HEADS[name]()).double().eval()
    with pytest.raises(
        ValueError, match="expected global average pooling and one linear layer behind '1' for cam, got"
    ):
        explain(model, random(2, 3, 8, 8), 1, ["cam"], "1")


def test_pooled_maps_of_the_classes_are_their_class_activation_maps():
    model = nn.Sequential(*features(), nn.Conv2d(6, 4, 1), nn.ReLU(), POOL(), nn.Flatten()).double().eval()
    images = random(2, 3, 8, 8)
    found = explain(model, images, torch.tensor([[1, 3], [0, 2]]), ["cam", "grad_cam", "hires_cam"])
    maps = model[:4](images).detach()
    expected = torch.stack([maps[0, [1, 3]], maps[1, [0, 2]]])
    assert found.layer == "3 (4 x 8 x 8)" and close(expected, found["cam"])
    assert close(expected / 64, found["grad_cam"]) and close(expected / 64, found["hires_cam"])
